"""`nextflow-hf app`: a NextFlow pipeline in the browser. Needs the extra `app`."""
