"""`gptjet load`: open- and closed-loop load against a server, and what may be concluded from it.

The parent (`coordinator`) starts worker processes (`worker`), which send what `workload` plans when
`arrivals` says; `measures` and `slo` turn the samples into figures, `validity` says whether the
client itself was fit to take them.
"""
