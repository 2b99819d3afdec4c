"""The recipe `speedrun`: a whole training as a few programs on one GPU, with nothing for the host to do between steps.

network  what is trained, and its twin in Keras that is published
whitening, crops, muon  its first layer, its batches, the optimizer of its convolutions
program  a part of an epoch, and the answers of a network, as one XLA program each
fitting  the training: progress, stop and resume, the Model
"""
