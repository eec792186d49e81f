"""Distillation of a dense BERT into a KronBert: data, losses, training and evaluation."""
