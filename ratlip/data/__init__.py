"""Datasets: readers of the official layouts, the generated set, and the one prepared format they all end in.

records.py    Record, the list of everything that is wrong, and how an image is opened
birds.py      CUB-200-2011       flowers.py   Oxford-102       faces.py   CelebA, CelebA-tiny
layout.py     what the three share: roots, tables, captions, split lists (pickles included)
synthetic.py  generated pictures, one object         scenes.py    the harder ones, two objects and a relation
facts.py      what captions say and images show, in numbers, and when a caption is true of an image
generated.py  what the generated sets have in common: values, numbering, fresh images of a caption
prepared.py   prepare() and load_prepared(), Prepared and Split
batches.py    training batches, crops, and the way from pixels to a network's input
download.py   what can be fetched, and where the rest comes from
"""
