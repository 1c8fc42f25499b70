"""The neutral host on the bundled digits: one recipe for every attention, as `foveate compare` trains them.

Command: foveate train classify/host_atto_digits model.kwargs.attention=window
Expect: at least 96 % held-out accuracy with every attention of the house; CONTRIBUTING tells how to measure.
Cost: half a minute to a minute on two CPU cores, by attention.
"""

_base_ = "nat_atto_digits.py"

model = dict(name="foveate_host_atto", kwargs=dict(attention="neighborhood"))
epochs = 20
