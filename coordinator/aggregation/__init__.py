"""How the updates of a round become the next generalist.

| module | what |
|---|---|
| `updates` | updates on disk, as flat vectors that are read in pieces |
| `means` | uniform and token-weighted mean, as a stream |
| `robust` | median, trimmed mean, Krum and multi-Krum, in blocks of coordinates |
| `ranks` | updates of different LoRA ranks: zero-padding, HetLoRA, FlexLoRA |
| `private` | a mean with differential privacy |
| `clipping` | a bound on how far one device can move any of them |
| `optimizers` | what the coordinator does with the result: momentum, Adam, Yogi |
| `staleness` | updates that started from an earlier generalist |
| `recipe` | a choice of these that is sound |
| `closing` | closes a round with one |

A strategy has the field's three verbs. Updates come in at any time and outlive a kill on disk, so
all three are called when a round closes: `configure_round` once, `accept` for every update in the
order of device ids, `aggregate` once. Whatever the order in which the updates arrived, and however
often a round is closed, the bytes are the same.
"""

from coordinator.aggregation.closing import AggregationError, Outcome, aggregate, conclude_sum
from coordinator.aggregation.recipe import Noise, Recipe, choose
from coordinator.aggregation.updates import Contribution, DamagedUpdateError

__all__ = [
    "AggregationError",
    "Contribution",
    "DamagedUpdateError",
    "Noise",
    "Outcome",
    "Recipe",
    "aggregate",
    "choose",
    "conclude_sum",
]
