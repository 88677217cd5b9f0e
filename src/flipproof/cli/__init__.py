"""The command line: ``main`` has the verbs, ``arguments`` their parser."""
