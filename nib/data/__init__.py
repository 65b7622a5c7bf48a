"""From documents to token shards on disk, and from these to batches.

Start with prepare.py (what prepare_data.py does) and dataset.py (the order of the data, as a function of the step).
"""
