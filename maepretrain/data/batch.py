"""The batch: what the data hand to a model.

- `input`: images, uint8 or uint16 (b, c, h, w); volumes, uint8 or uint16 (b, c, t, h, w); signals,
  float (b, c, t); or tokens, int64 (b, 1, t). Images are normalised on the device: a model gets
  float.
- `position`: int64 (b,), the number of each sample in the run. All randomness of a sample comes
  from (seed, position).
- `label`: int64 (b,), where the samples have one. Only verbs that use labels ask for it.

A model answers with a dictionary of scalars of the same type, which holds `loss`.
"""

from torch import Tensor

Batch = dict[str, Tensor]
