while retrieved_job.status != "succeeded":
    time.sleep(10)
    retrieved_job = client.fine_tuning.jobs.retrieve(job.id)
    if retrieved_job.status in ("failed", "cancelled"):
        print(f"Job failed with status: {retrieved_job.status}")
        break

print(f"Job completed with status: {retrieved_job.status}")

retrieved_job = client.fine_tuning.jobs.retrieve(job.id)
fine_tuned_model = retrieved_job.fine_tuned_model
print(f"Fine-tuned model: {fine_tuned_model}")
