"""One command a file: its options and help, and how its result looks to people. The work is done in the rooms below."""
