"""What a vision tokenizer makes of images: PSNR, SSIM and GMSD of each, and where it is asked for r-FID of all.

nextflow-hf evaluate reconstruction MODEL data=path/to/images [features=inception]
"""
