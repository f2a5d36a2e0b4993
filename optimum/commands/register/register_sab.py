"""Makes `optimum-cli sab ...` of `sab-hf ...`. optimum imports each file in this namespace folder when its command starts."""

import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class SABCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="sab", help="Binarized vision-language models: the same as `sab-hf`.")

    @staticmethod
    def parse_args(parser):
        from sab_hf_command import parsing_part  # optimum parses for every command, so nothing heavy is imported here

        with parsing_part() as cli:
            cli.add_commands(parser)

    def run(self):
        from sab_hf.cli import execute

        sys.exit(execute(self.args, self.parser))


REGISTER_COMMANDS = [SABCommand]
