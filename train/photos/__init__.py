"""Real photos for training an adapter: a whole photo, a picture of its subject as reference, and a caption.

Read in this order: `sample` (what a photo is, and what gives photos), `folder`, `hub` and `shards` with `places` (the
three forms they come in), `sources` (which of these a name means), `part`, `order` (which photo is sample `n` of a run),
`dataset` (what a training gets), `batches`, `cache`, `task`. `captions` and `report` serve `train.prepare`, which makes a
folder of photos ready.
"""
