"""Pictures. matplotlib is imported when one is drawn, so the text drawing needs nothing but the plan language."""

from loopwise.plots.bars import score_bars
from loopwise.plots.layers import layers_picture
from loopwise.plots.picture import plan_picture
from loopwise.plots.text import plan_text

__all__ = ["layers_picture", "plan_picture", "plan_text", "score_bars"]
