"""The command line.

``verbs`` says what each verb takes and runs, ``arguments`` is the parser, ``model`` what MODEL may be, and ``main``
begins and ends it all: whatever the user can get wrong is one line there.
"""
