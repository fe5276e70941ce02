"""First-order alignment and zeroth-order refinement of Hugging Face models."""
