"""The neutral host on the bundled digits: one recipe for every attention, as `foveate compare` trains them.

Command: foveate train classify/host_atto_digits model.kwargs.attention=window
Expect: 96.7 to 98.7 % held-out accuracy, by attention, after the last epoch (seed 0, `foveate compare`).
Cost: half a minute to two minutes on two CPU cores, by attention.
"""

_base_ = "nat_atto_digits.py"

model = dict(name="foveate_host_atto", kwargs=dict(attention="neighborhood"))
epochs = 20
