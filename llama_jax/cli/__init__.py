"""The code that all commands share: flags, config files, errors in one line.

  command.py       --config and path flags; runs a command, turns a UserError into one line
  config_file.py   finds a config file and runs it
  config_flags.py  a flag for every field of the config
  field_names.py   suggests the config field that a misspelt name may mean
  flag_names.py    suggests the flag that a misspelt name may mean
  interrupts.py    handles Ctrl-C while a command still imports

Rule: only commands import this room; it may import anything but a command.
"""
