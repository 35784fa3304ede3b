"""What the commands share: flags, config files, errors in one line.

  command.py       --config and path flags; runs a command, turns a UserError into one line
  config_file.py   finds a config file and runs it
  config_flags.py  a flag for every field of the config
  field_names.py   what a misspelt config field most likely means
  flag_names.py    what a misspelt flag most likely means
  interrupts.py    Ctrl-C while a command still imports

Rule: only commands import this room; it may import anything but a command.
"""
