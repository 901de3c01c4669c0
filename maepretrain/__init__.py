"""maepretrain: self-supervised pretraining of masked autoencoders from WebDataset shards."""

__version__ = "0.2.0"
