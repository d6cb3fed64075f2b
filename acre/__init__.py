"""acre: long documents, read once and questioned many times.

    model = acre.Model.from_pretrained("path/to/model")
    cache = model.build(open("book.txt").read())
    answer = cache.ask("Who found the letter?")
    print(answer.text, answer.passages(limit=3))

Reading makes a bi-layer cache; a question refills only the passages that it needs.
"""

from acre._core import BusyError, DeviceError, TooLongError, __version__
from acre.cache import Cache
from acre.chat import Frame
from acre.errors import CacheFileError, ModelFileError
from acre.eval import evaluate, sweep
from acre.generate import Stream
from acre.model import Model
from acre.report import Answer, Span, Stats
from acre.scoring import Scoring
from acre.tokenizer import Tokenizer

__all__ = [
    "Answer",
    "BusyError",
    "Cache",
    "CacheFileError",
    "DeviceError",
    "Frame",
    "Model",
    "ModelFileError",
    "Scoring",
    "Span",
    "Stats",
    "Stream",
    "Tokenizer",
    "TooLongError",
    "__version__",
    "evaluate",
    "sweep",
]
