"""The compiler: a pretrained decoder with a mixture of LoRA experts becomes a bundle."""

import logging

# transformers imports torchao, which executorch brings; what both of them say of CUDA kernels and
# of torch's next version is of no use to anyone here.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

# How the base's large matrices may be held.
PRECISIONS = ("float32", "int8", "int4")
