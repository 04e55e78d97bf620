"""Models: give a transformers decoder a plan, unroll it, load and save it; and models of our own.

The first import of this room tells the Auto classes of transformers about configurations of type "loopwise" and of the
types of our own models.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from loopwise.models.causal import LoopwiseForCausalLM
from loopwise.models.decoder import LoopwiseModel
from loopwise.models.decoder_config import LoopwiseDecoderConfig
from loopwise.models.door import register
from loopwise.models.encoder import LoopwiseEncoder, LoopwiseEncoderConfig
from loopwise.models.puzzle import LoopwisePuzzleConfig, LoopwisePuzzleModel
from loopwise.models.regression import LoopwiseForRegression, LoopwiseRegressionConfig

register()
for config_class, model_class in (
    (LoopwiseDecoderConfig, LoopwiseModel),
    (LoopwisePuzzleConfig, LoopwisePuzzleModel),
    (LoopwiseRegressionConfig, LoopwiseForRegression),
    (LoopwiseEncoderConfig, LoopwiseEncoder),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
AutoModelForCausalLM.register(LoopwiseDecoderConfig, LoopwiseForCausalLM, exist_ok=True)
