"""How answers are shown: executed notebooks, tables, the page."""
