"""maepretrain: self-supervised pretraining of masked autoencoders from WebDataset shards."""

__version__ = "0.1.0"
