"""Serving engines that need to be told what a ragged or `disp` folder is; plain ones need nothing of ours."""
