"""One HTML page that needs nothing else: a result, its evidence and its raw summary.

Needs the extra `steepest[report]` (plotly, jinja2). The page carries the summary it was made from,
so `read` gets it back and the page can be rebuilt.
"""

from steepest.lab.report.page import find, find_all, read, render, write, write_to

__all__ = ["find", "find_all", "read", "render", "write", "write_to"]
