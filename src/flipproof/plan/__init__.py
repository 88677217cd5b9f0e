"""What a training needs before anything is rented: memory, communication, time and money, without a GPU."""
