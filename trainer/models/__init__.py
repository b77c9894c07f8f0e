"""timm models with a recipe's options and parts: building, first weights, editing."""
