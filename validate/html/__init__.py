"""report.json as one HTML page for offline reading: no script, no request, every plot an inline SVG.

page.py        the page: verdict, sections, and the templates next to it
coverage.py    what was judged of what the target allows
plots.py       errors by layer and by position, KL divergences, routers' margins
rounding.py    half precision at every layer and operator
svg.py         scales, lines and marks that keep their shape on any width
words.py       numbers and texts as the page shows them
"""

from qwenport.validate.html.page import render

__all__ = ["render"]
