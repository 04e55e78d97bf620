"""Models: give a transformers decoder a plan, unroll it, load and save it.

The first import of this room tells the Auto classes of transformers about configurations of type "loopwise".
"""

from loopwise.models.door import register

register()
