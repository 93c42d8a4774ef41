"""Networks applied to images: single photographs and whole data sets."""

from hrpose.infer.evaluate import evaluate
from hrpose.infer.predictor import Poses, Predictor
from hrpose.infer.protocol import Protocol

__all__ = ["Poses", "Predictor", "Protocol", "evaluate"]
