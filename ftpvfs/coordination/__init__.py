"""What processes tell each other: what has changed, who may write, who is connected. Nothing else reaches for files
or locks to do so, so that another form of it, for several machines, can take its place.

Nothing here is held by a process that is gone, however it ended.
"""
