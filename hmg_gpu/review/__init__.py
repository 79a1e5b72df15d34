"""The page on which an annotator clicks points, sees their masks at once and corrects them.

gallery.py      images by number, read when they are asked for
point_masks.py  the mask of one point, how sure it is, and what PMG saw
history.py      points and all that was done to them: a journal, undo
saving.py       points to and from CSV
session.py      what the page can ask for; no HTTP
export.py       masks, COCO and the list of changes
routes.py       addresses to calls of the session
server.py       HTTP within limits
static/         the page
"""

from hmg_gpu.review.server import serve
from hmg_gpu.review.session import Session

__all__ = ["Session", "serve"]
