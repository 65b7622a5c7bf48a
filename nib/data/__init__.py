"""From documents to token shards on disk, and from shards to batches.

Start with prepare.py (what prepare_data.py does) and order.py (the order of the data, as a function of the step).
"""
