"""lm-evaluation-harness with acre as one of its models; importing it registers "acre".

`main` is the harness's own command line. docs/LM_EVAL.md tells what is computed.
"""

from acre.harness.model import AcreLM, main

__all__ = ["AcreLM", "main"]
