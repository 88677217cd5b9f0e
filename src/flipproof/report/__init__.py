"""What was measured as one HTML page: ``page`` renders ``sections`` of what ``sources`` reads; ``curves`` has the
analysis, ``figures`` the pictures for print and ``charts`` those for the screen.
"""
