with open(test_path, 'r') as f:
    test_data = [json.loads(line) for line in f]

for test_datapoint in tqdm.tqdm(test_data):
    finetuned_response = client.responses.create(
        model=fine_tuned_model,
        input=test_datapoint['messages'][0]['content'],
    )
    base_response = client.responses.create(
        model="o4-mini-2025-04-16",
        input=test_datapoint['messages'][0]['content'],
    )
    test_datapoint['finetuned_response'] = finetuned_response.output_text
    test_datapoint['base_response'] = base_response.output_text

# Display the comparisons
console = Console()
for test_datapoint in test_data:
    console.print(Panel(
        Text(test_datapoint['messages'][0]['content'], style="black"),
        title="[bold black]Input[/bold black]",
        border_style="black",
        style="on white"
    ))
    console.print(Panel(
        Text(test_datapoint['base_response'], style="blue"),
        title="[bold blue]Base Model Response[/bold blue]",
        border_style="blue"
    ))
    console.print(Panel(
        Text(test_datapoint['finetuned_response'], style="green"),
        title="[bold green]Fine-Tuned Model Response[/bold green]",
        border_style="green"
    ))
    console.print("\n" + "="*80 + "\n")
