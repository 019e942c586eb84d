"""
Construction of training data as in the paper (section 3.5), from a laptop to a cluster.

Reading order: `recipe.py` (what is asked for), `readers.py` (shards to items), `pictures.py` (items to pictures, or a
reason why not), `duplicates.py`, `models.py` (scores, captions, codes), `writers.py`, `report.py`, and `pipeline.py`,
which leads through the passes on Ray Data.
"""
