"""Does the change of the weights explain the shift of the activations?"""
