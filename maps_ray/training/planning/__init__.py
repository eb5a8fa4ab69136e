"""`maps-ray plan`: what a run needs in memory, time and money before it is started.

`subject` turns a spec into a policy without weights, `profile` runs it on shapes alone, `terms` says what lies in
memory under which ZeRO stage, `plan` puts that beside devices and looks for changes that fit, `show` prints it.
"""
