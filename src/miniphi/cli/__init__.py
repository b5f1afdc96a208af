"""The command line: one small file per command. The only room that knows argparse, terminals and exit codes."""
