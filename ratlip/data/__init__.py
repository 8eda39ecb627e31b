"""Datasets: readers of the official layouts, the generated set, and the one prepared format they all end in.

records.py    Record, and the list of everything that is wrong
layout.py     tables, captions and split lists of the official layouts
birds.py      CUB-200-2011       flowers.py   Oxford-102       faces.py   CelebA, CelebA-tiny
synthetic.py  generated pictures
prepared.py   prepare() and load_prepared()
download.py   what can be fetched, and where the rest comes from
"""
