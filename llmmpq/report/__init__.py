"""One HTML page about a quantized folder, for a reader who was not there when it was made.

`evidence.py` collects what the folder and the files beside it say, `bit_map.py`, `axis.py` and `sections.py` turn that
into what is drawn, `page.html` and `style.css` draw it. The page holds everything it needs: no script, no network.
"""
