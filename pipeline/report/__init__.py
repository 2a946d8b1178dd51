"""The report of a run or sweep: what is known of it, as numbers and as one HTML page.

Every module makes one part of the numbers. A part whose inputs are not there is ``None``, and
``missing`` says why. ``page.py`` turns the numbers into the page.
"""
