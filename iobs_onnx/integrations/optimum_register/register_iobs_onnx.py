"""Read by every `optimum-cli` call: adds `onnxruntime prune`, and must never break another command.

Optimum finds this file in its namespace folder `optimum/commands/register`.
"""

try:
    from optimum.commands.onnxruntime.base import ONNXRuntimeCommand

    from iobs_onnx.integrations.optimum_command import INFO
except ImportError:
    # An Optimum without the ONNX Runtime commands has nothing to add this one to.
    pass
else:
    ONNXRuntimeCommand.SUBCOMMANDS += (INFO,)

REGISTER_COMMANDS: list[type] = []
