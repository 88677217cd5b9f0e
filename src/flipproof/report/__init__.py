"""What was measured as one HTML page. In reading order: ``read`` finds the files, ``analyse`` computes what a sweep says,
``draw`` makes pictures, ``finding`` two sentences and ``sections`` the parts of what ``page`` writes.
"""
