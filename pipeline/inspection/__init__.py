"""Looking at samples: what a teacher, another label set or a student says of every token.

``record.py`` is the value that everything shows: a terminal (``terminal.py``, ``browse.py``), one
HTML page (``page.py``) and a local server (``server.py``). ``measures.py`` lists what tokens can be
coloured by; to add one, write a line there and its number in ``record.py``. The package is not
called ``inspect``, which is a module of the standard library.
"""
