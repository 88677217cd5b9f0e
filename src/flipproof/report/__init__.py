"""What was measured as one HTML page. In reading order: ``read`` finds the files, ``analyse`` computes what a sweep
says, ``figures`` makes pictures, ``finding`` two sentences, ``sections`` the parts of the page, and ``page`` writes it.
"""
