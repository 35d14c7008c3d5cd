"""One HTML page about a quantized folder, for a reader who was not there when it was made.

`evidence.py` collects what the folder and the files beside it say; `sections.py` (words), `charts.py` and `bit_map.py`
(drawings) turn that into plain values; `page.html` and `style.css` show them. The page holds everything it needs: no
script, no network.
"""
