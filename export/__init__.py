"""The compiler: a pretrained decoder with a mixture of LoRA experts becomes a bundle."""
