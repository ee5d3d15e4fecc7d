"""What reports and waiting look like: a progress bar, HTML pages, the charts' colours and fonts, sizes.

Knows nothing of models; imports errors.py and whole_file.py, and rich, matplotlib or Jinja2 where they are used. Begin
in pages.py.
"""
