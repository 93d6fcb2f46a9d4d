"""The command `marginrm` and the subcommands that need only the library."""
